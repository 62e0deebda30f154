"""Airlock: Recursive Language Model queries over untrusted context, isolated, bounded and on record.

from orchestrator import RLM

with RLM(model="gpt-5-mini") as rlm:
    print(rlm.completion("What is the magic number?", Path("haystack.txt")).response)
"""

from orchestrator.client import Client
from orchestrator.client.answers import ServiceError
from orchestrator.core.errors import (
    AirlockError,
    LimitError,
    MachineError,
    ProviderError,
    RequestError,
)
from orchestrator.rlm import RLM, AsyncRLM, Completion

__all__ = [
    "RLM",
    "AirlockError",
    "AsyncRLM",
    "Client",
    "Completion",
    "LimitError",
    "MachineError",
    "ProviderError",
    "RequestError",
    "ServiceError",
]
