"""The gateway: conversations of agents as tokens that the engine has sampled, never rendered twice.

chat_template  a tokenizer's chat template as text
chat_format    the first prompt of a conversation, and the bridge from each reply to the next
chat_checks    a chat format tried out before anything is sampled with it
"""
