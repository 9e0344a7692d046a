"""Tasks: where prompts come from and how completions are scored.

base        what a task is, and how one is found by its import path
arithmetic  sums and differences, made from a seed
gsm8k       word problems from a file or a data set
dataset     your own data by configuration alone, and mix, several tasks in one run; data/ is what they are made of
reasoning_gym  puzzles of the package of that name
shaping     pure functions for rewards: penalties on length, a check of form
prompts     the stream of training prompts as token ids, the held-out ones, and what is left out
shuffle     the order of training, without a list
rendering   a prompt's text or chat messages as token ids
payloads    what may travel with a prompt
helper      a daemon's end of the helper process, in which alone the code of a task runs
trial       a few prompts of a run before anything is started
"""
