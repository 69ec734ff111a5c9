"""In-context tasks: LLM Foundry's task files, prompts, metrics and averages, on a model of any mesh."""
