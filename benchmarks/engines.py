"""The two engines side by side, in-process: what the default on a CPU is worth.

    python -m benchmarks.engines

SmolLM2-135M, greedy, no end token, 64 new tokens a sequence. The engines take turns within a round.
Not here: HTTP, TorchServe, other servers.
"""

from tqdm import tqdm

from benchmarks.engine_batching import load, ours
from benchmarks.record import summary, write
from deploy.export import export
from deploy.weights import get_weights
from handler.config import EngineConfig
from handler.engine import Engine, create_engine

ROUNDS = 3
SEQUENCES = (1, 8, 32)


def engines() -> dict[str, Engine]:
    """Each engine as the archive of SmolLM2 would configure it."""
    weights = get_weights("smollm2-135m")
    made: dict[str, Engine] = {}
    for dtype in ("float32", "bfloat16"):
        config = EngineConfig(name="transformers", dtype=dtype)
        made[f"transformers {dtype}"] = create_engine(weights, config)
    for precision in ("int8", "int4"):
        config = EngineConfig(name="openvino", precision=precision)
        made[f"openvino {precision}"] = create_engine(export(weights, config), config)
    for engine in made.values():
        engine._ends = set()
    return made


def main() -> None:
    """Measure and write results/engines.json."""
    systems = engines()
    rates: dict[str, dict[int, list[float]]] = {n: {s: [] for s in SEQUENCES} for n in systems}
    progress = tqdm(total=ROUNDS * len(SEQUENCES) * len(systems), unit="run")
    for _ in range(ROUNDS):
        for sequences in SEQUENCES:
            requests = load(sequences, mixed=False)
            tokens = sum(length for _, length in requests)
            for name, engine in systems.items():
                rates[name][sequences].append(tokens / max(ours(engine, requests)))
                progress.update()
    figures = {
        name: {f"{sequences} sequences": summary(values) for sequences, values in by.items()}
        for name, by in rates.items()
    }
    packages = ["torch", "transformers", "openvino", "openvino-genai"]
    print(write("engines", {"tokens_per_second": figures}, packages).name)


if __name__ == "__main__":
    main()
