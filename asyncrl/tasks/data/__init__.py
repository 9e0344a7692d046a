"""What tasks make their examples of: records of files and of the hub, and rewards by the names of their arguments.

records    reads records, and names those that cannot be used by place and reason
wording    a record as a prompt and its answer
rewards    reward functions that say by their signature what they need
answers    answers in texts: numbers, patterns, equality
overlap    what training and evaluation have in common
results    what a user's function returned, as the program needs it
order      which example is trained when: a curriculum, and the shares of a mix
"""
