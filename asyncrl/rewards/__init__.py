"""Rewards: named parts, and the processes that compute them.

base           what all kinds of parts have in common
kinds          the kinds that a configuration can name
parts          a run's parts: their configuration checked, their values computed and weighted
pool           worker processes that can be killed
worker         one of them
pipe           what goes between pool and worker
gate           holds rewards back while a server is down
http_endpoint  requests to the server of a part
servers        keeps servers of reward models alive
model_server   one of them: `python -m asyncrl.rewards.model_server`
"""
