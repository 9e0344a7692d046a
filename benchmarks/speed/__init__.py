"""Speed: each figure beside a floor or a peer in the same run."""
