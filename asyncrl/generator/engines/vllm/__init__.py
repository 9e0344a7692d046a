"""The rollout engine over vLLM.

engine         sampling, scoring and the phases of a swap, in the daemon
options        how vLLM is set up
outputs        its outputs as completions, checked
plugin         receives weights in vLLM's worker processes
direct_apply   puts a staged version in place by plain copies
load_recorder  watches the one load that those copies are read off
"""
