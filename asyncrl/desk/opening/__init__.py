"""How a learner starts: which run is in its folder, and where that goes on."""
