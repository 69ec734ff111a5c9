"""Recipes of LLM Foundry, Composer and axolotl turned into this project's, with an account of every key.

report.py       the account, as text and as JSON
draft.py        an old recipe that is being moved key by key
names.py        keys here by other projects' names, from the schema
training.py     what LLM Foundry and Composer share: durations, loaders, optimizer, schedule, sharding
mpt.py          LLM Foundry's MPT as a model here, or the reasons why it is none
hf.py           a local Hugging Face model by its family
llm_foundry.py, axolotl.py, composer.py    one for each kind of recipe
finish.py       the check by the recipe loader, and the file
"""
