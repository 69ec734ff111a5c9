"""Exported directories given to vLLM, in a process of its own: ``vllm_loads.py DIR``.

Every directory of DIR has a config.json and tensors, each filled with a number of its own. vLLM reads the config,
builds its model on the CPU and takes the tensors; where each number is found afterwards is where its tensor went. This
needs neither a GPU nor vLLM's compiled extensions, and runs nothing. What vLLM has for no CPU is put aside: kernels of
experts with biases, and sparse attention.

DIR/results.json has by name either the error, or the class of the model, the tensors that went nowhere, and the
parameters that got nothing. It imports nothing of this project.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_LOGGING_LEVEL": "CRITICAL", "VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PretrainedConfig
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend, backend_to_kernel_cls
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import registry
from vllm.platforms.cpu import CpuPlatform
from vllm.utils.torch_utils import set_default_torch_dtype

WITHOUT_A_CONFIG = ("sarvam_moe", "bailing_moe")
"""Model types for which vLLM asks for the class beside the published weights; any class that keeps all keys will do."""
MAX_LENGTH = 32


def stand_in() -> None:
    """Look into models here, not in processes of their own; and put something in the place of what has no CPU."""
    registry._run_in_subprocess = lambda look: look()
    for name in WITHOUT_A_CONFIG:
        AutoConfig.register(name, type(name, (PretrainedConfig,), {"model_type": name}), exist_ok=True)
    choose, attention = unquantized_fused_moe_method.select_unquantized_moe_backend, CpuPlatform.get_attn_backend_cls

    def backend_of_experts(moe_config: Any) -> tuple[Any, Any]:
        try:
            return choose(moe_config=moe_config)
        except NotImplementedError:
            return UnquantizedMoeBackend.CPU, backend_to_kernel_cls(UnquantizedMoeBackend.CPU)[0]

    def backend_of_attention(_: type, selected_backend: Any, attn_selector_config: Any, **others: Any) -> str:
        return attention(selected_backend, attn_selector_config._replace(use_sparse=False), **others)

    unquantized_fused_moe_method.select_unquantized_moe_backend = backend_of_experts
    CpuPlatform.get_attn_backend_cls = classmethod(backend_of_attention)


def config_of(directory: Path) -> VllmConfig:
    options: dict[str, Any] = {"skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True}
    return EngineArgs(model=str(directory), max_model_len=MAX_LENGTH, **options).create_engine_config()


def loaded(directory: Path, config: VllmConfig) -> dict[str, Any]:
    with set_default_torch_dtype(torch.float32):
        model = initialize_model(config, model_config=config.model_config)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    tensors = load_file(directory / "model.safetensors")
    model.load_weights(iter(tensors.items()))
    values = [each.detach().float() for each in (*model.parameters(), *model.buffers())]
    found = {number for each in values for number in each[~each.isnan()].unique().tolist()}
    return {
        "class": type(model).__name__,
        "unread": sorted(name for name, tensor in tensors.items() if tensor.flatten()[0].item() not in found),
        "missing": sorted(name for name, parameter in model.named_parameters() if parameter.isnan().any()),
    }


def main(root: Path) -> None:
    stand_in()
    results: dict[str, Any] = {}
    for directory in sorted(path for path in root.iterdir() if path.is_dir()):
        try:
            config = config_of(directory)
            with set_current_vllm_config(config), torch.no_grad():
                if not torch.distributed.is_initialized():
                    init_distributed_environment(1, 0, f"file://{root / 'rendezvous'}", 0, "gloo")
                    initialize_model_parallel(1)
                results[directory.name] = loaded(directory, config)
        except Exception as error:  # whatever its classes may raise
            results[directory.name] = {"error": f"{type(error).__name__}: {error}"}
    (root / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
