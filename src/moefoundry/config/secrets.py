"""Secrets that recipes, commands and messages may hold, and what is shown in their place."""

from __future__ import annotations

import re


def looks_secret(name: str) -> bool:
    """Tell whether a key or an environment variable is named like a secret, whose value must never be shown or kept."""
    return re.search(r"key|token(?!izer)|secret|passw|credential", name, re.IGNORECASE) is not None


_TOKEN = re.compile(
    r"""\b(?: hf_[A-Za-z0-9]{20,}          # Hugging Face
        | sk-[A-Za-z0-9_-]{20,}         # OpenAI, Anthropic
        | (?:AKIA|ASIA)[A-Z0-9]{16}     # AWS
        | gh[pousr]_[A-Za-z0-9]{20,}    # GitHub
        | glpat-[A-Za-z0-9_-]{20,}      # GitLab
        | AIza[A-Za-z0-9_-]{35}         # Google
        | xox[abprs]-[A-Za-z0-9-]{10,}  # Slack
        | dapi[0-9a-f]{32}              # Databricks
    )\b
    | (?:(?<=://)|(?<=:/)) [^/\s:@'"]* : (?!\d+/) [^\s'"]+ (?=@)  # the password of an address; a path loses a slash
    # what signs a URL
    | (?<=[?&]) (?i:[\w-]*(?:key|token|secret|passw|credential|signature)[\w-]*|sig) = [^&\s'"#]+ (?<![:;,.])""",
    re.VERBOSE,
)
_WANDB_KEY = re.compile(r"\b[0-9a-f]{40}\b")  # so is a commit of git, which elsewhere may be shown
_NAME = r"""(?:[\w.-]{0,64}[_.-])?(?:api_?key|(?:access|secret|private|account)_?key|passw(?:or)?d|passphrase|secret
    |(?:api|auth|access|bearer|bot|hf|refresh|session)_?token|credentials?)"""
_SECRET_KEY = re.compile(rf"token|{_NAME}", re.IGNORECASE | re.VERBOSE)
_ASSIGNED = re.compile(  # api_key=planted, {api_key: planted}; but not `api_key: unknown key` of an error
    rf"""( \b{_NAME}["']?\s*=\s* | [{{,]\s*["']?{_NAME}["']?\s*:\s* )
    (?! null\b | None\b | [$({{[] ) (?: "[^"]*" | '[^']*' | [^\s,}}\]"'&]+ )""",
    re.IGNORECASE | re.VERBOSE,
)
REDACTED = "(secret)"


def redact(text: str, path: str = "") -> str:
    """Hide what looks like a token of a well-known service, and what stands under a key such as ``api_token``.

    Args:
        text: Text that is about to be shown or kept.
        path: Its key, where it is the value of one.
    """
    if text and _SECRET_KEY.fullmatch(path.rpartition(".")[2]):
        return REDACTED
    text = _ASSIGNED.sub(rf"\1{REDACTED}", _TOKEN.sub(REDACTED, text))
    return _WANDB_KEY.sub(REDACTED, text) if path.startswith("loggers.") else text
