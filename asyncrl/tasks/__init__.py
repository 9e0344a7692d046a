"""Tasks: where prompts come from and how completions are scored.

base        what a task is, and how one is found by its import path
arithmetic  sums and differences, made from a seed
gsm8k       word problems from a file or a data set
shaping     pure functions for rewards: penalties on length, a check of form
prompts     the stream of training prompts as token ids, and the held-out ones
shuffle     the order of training, without a list
"""
