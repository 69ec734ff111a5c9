"""Model families: how a Hugging Face config and its tensors map to this project's, and back.

A family is data: what its config says in our recipe's terms, and which rows of which Hugging Face tensor are which of
our parameters. Nothing here reads or writes files; ``checkpoint/`` does.
"""
