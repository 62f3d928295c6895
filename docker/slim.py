"""Remove the files that a server never opens from an environment, and compile what it imports.

    python3 slim.py /opt/venv

The image's build runs this after pip. Packages that are not installed are skipped. Then it imports
what a worker imports, so that exactly those modules have bytecode: a read-only container cannot
store bytecode and would compile at every start.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

UNUSED = {
    "torch": [
        "bin/[!t]*",  # protoc; torch needs torch_shm_manager at every import
        "bin/test*",
        "include",  # C++ headers
        "share",  # CMake files
        "test",
        "fx/passes/tests",
        "**/*.h",
        "lib/*.a",  # static libraries
        "lib/*test*.so",
        "lib/libbackend_with_compiler.so",  # for a test
    ],
    "openvino": [
        "include",
        "cmake",
        "tools",  # converters; the model was converted in stage 1
        "libs/libopenvino_intel_gpu_plugin.so",  # other devices
        "libs/libopenvino_intel_npu_plugin.so",
        "libs/cache.json",  # the GPU's tuning data
        "libs/libopenvino_jax_frontend*",  # readers of other formats
        "libs/libopenvino_onnx_frontend*",
        "libs/libopenvino_paddle_frontend*",
        "libs/libopenvino_pytorch_frontend*",
        "libs/libopenvino_tensorflow_*",
        "libs/libopenvino_gguf_frontend*",
    ],
    "torchgen": ["packaged"],
    "sympy": ["**/tests"],  # torch imports both to compile models
    "networkx": ["**/tests"],
    "mpmath": ["tests"],
    "regex": ["tests"],
    "fsspec": ["tests"],
    "certifi": ["tests"],
    "cffi": ["*.h"],
    "numpy": ["**/tests", "f2py", "distutils", "_core/include", "_core/lib", "random/lib"],
    "ts": ["torch_handler/unit_tests", "examples"],
    "pip": ["*"],
    "setuptools": ["*"],
    "pkg_resources": ["*"],
    "_distutils_hack": ["*"],
}

COMPILES = "vllm"
"""Compiles kernels while it runs, with torch's headers: beside it, torch stays whole."""

WORKER = "ts.model_service_worker ts.metrics.metric_cache_yaml_impl yaml pydantic jinja2 psutil"
ENGINES = {
    "openvino_genai": "openvino openvino_genai numpy tokenizers",
    "transformers": "torch transformers accelerate transformers.models.auto.modeling_auto "
    "transformers.models.llama.modeling_llama transformers.models.gpt2.modeling_gpt2 "
    "transformers.models.gpt_neox.modeling_gpt_neox transformers.generation.utils",
    "vllm": "vllm vllm.v1.engine.llm_engine",
    "google": "google.cloud.storage",
}


def main(environment: Path) -> None:
    """Slim one virtual environment in place."""
    packages = next(environment.glob("lib/python3*/site-packages"))
    for package, patterns in UNUSED.items():
        if package == "torch" and (packages / COMPILES).is_dir():
            continue
        for pattern in patterns:
            for path in list((packages / package).glob(pattern)):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for folder in packages.glob("*"):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    for metadata in (*packages.glob("pip-*"), *packages.glob("setuptools-*")):
        shutil.rmtree(metadata)
    (packages / "distutils-precedence.pth").unlink(missing_ok=True)  # also from setuptools
    for program in environment.glob("bin/pip*"):
        program.unlink()
    for jar in packages.glob("ts/frontend/*.jar"):
        extract_epoll(jar)
    modules = [*WORKER.split()]
    for name, more in ENGINES.items():
        if (packages / name).is_dir():
            modules += more.split()
    # worker.py, which the image's build puts beside this file, imports TorchServe without torch.
    code = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    code += "import worker\nworker.import_torchserve()\nimport importlib\n"
    code += "\n".join(f"importlib.import_module({m!r})" for m in modules)
    subprocess.run([environment / "bin" / "python", "-c", code], check=True)


def extract_epoll(jar: Path) -> None:
    """Put TorchServe's native libraries for Unix sockets beside its jar, where Java finds them.

    Netty would extract them to /tmp when it starts, but containers mount /tmp with noexec.
    """
    with zipfile.ZipFile(jar) as content:
        for name in content.namelist():
            if name.startswith("META-INF/native/libnetty_transport_native_epoll_"):
                (jar.parent / Path(name).name).write_bytes(content.read(name))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
