"""Where prompts come from and how completions are scored."""
