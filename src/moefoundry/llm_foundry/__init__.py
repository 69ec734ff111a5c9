"""LLM Foundry: its recipes run by its own trainer, and our experts inside its MPT: ``docs/llm_foundry.md``.

``recipe`` and ``fit`` import neither torch nor LLM Foundry; ``run`` and ``mpt`` import both.
"""
