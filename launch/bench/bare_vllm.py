"""The peer of rollouts.py: `vllm.LLM.generate` and nothing else. A line on stdin is a round; its answer is a line."""

import json
import os
import sys
import time
from pathlib import Path

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    TORCHDYNAMO_DISABLE="1",
)


def main() -> None:
    """argv[1] is a file with the requests."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    asked = json.loads(Path(sys.argv[1]).read_text())
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    llm = LLM(
        model=_whole(asked), skip_tokenizer_init=True, dtype="float32", max_model_len=asked["longest"],
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 30, logprobs_mode="processed_logprobs", block_size=32, enable_chunked_prefill=False,
        max_num_batched_tokens=max(4096, asked["longest"]), use_tqdm_on_load=False,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    print("ready", file=said, flush=True)
    for line in sys.stdin:
        params = [
            SamplingParams(
                n=asked["count"], max_tokens=asked["budget"], temperature=1.0, logprobs=0, flat_logprobs=True,
                detokenize=False, stop_token_ids=[asked["closer"]], logit_bias={asked["opener"]: float("-inf")},
                seed=1000 * int(line) + 100 * p,
            )
            for p in range(len(prompts))
        ]  # fmt: skip
        llm.reset_prefix_cache()
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        tokens = sum(len(one.token_ids) for output in outputs for one in output.outputs)
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=said, flush=True)
    llm.llm_engine.engine_core.shutdown()


def _whole(asked: dict) -> str:
    """A model folder: the configuration, and the weights that were published last."""
    folder = Path(sys.argv[1]).parent / "bare_model"
    folder.mkdir()
    newest = sorted(Path(asked["weights"]).glob("version_*"))[-1]
    for path in (*Path(asked["model"]).iterdir(), *newest.iterdir()):
        (folder / path.name).write_bytes(path.read_bytes())
    return str(folder)


if __name__ == "__main__":
    main()
