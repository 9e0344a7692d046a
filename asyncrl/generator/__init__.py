"""The generator daemon: leases in, scored groups of completions out, weights updated in flight.

daemon         the loops: what the learner says, beats, the engine, the end
assembly       a daemon from its configuration
identity       which generator this is, and which of its lives
learner_link   session and socket to the learner
held_leases    the leases in hand, and the room for more
lease_runner   one lease: prompt -> completions -> rewards -> group
weight_phases  the generator's part in a weight sync
engines        what samples: the protocol, and vLLM
"""
