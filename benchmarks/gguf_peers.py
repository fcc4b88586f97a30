"""Peers that read a GGUF file: llama.cpp and OpenVINO GenAI, on the same weights in three of its formats.

    pip install xllamacpp openvino-genai    # both ship what they run

The wheel of llama.cpp is built for any machine with AVX2: compiled on the machine itself it can be faster.
"""

import functools
import importlib.util
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, dequantize, quantize

from benchmarks.peers import Generate, Prompts

FILE_TYPES = {"Q4_1": LlamaFileType.MOSTLY_Q4_1, "Q8_0": LlamaFileType.MOSTLY_Q8_0, "F16": LlamaFileType.MOSTLY_F16}
"""Formats that a peer runs in: 4 bits, 8, and 16."""
_CONTEXT = 2048
"""Tokens that a row may take."""


def gguf_makers(source: Path, work: Path, threads: int) -> dict[str, Callable[[], Generate]]:
    """How to start each peer that is installed, by name such as "llama.cpp Q8_0".

    Args:
        source: the model as a GGUF file; its other formats are written into `work` when they are asked for.
        work: a folder for files.
        threads: how many cores each may use.
    """
    starts: dict[str, Callable[[Path, int], Generate]] = {}
    if importlib.util.find_spec("xllamacpp"):
        starts["llama.cpp"] = llama_cpp_peer
    if importlib.util.find_spec("openvino_genai"):
        starts["openvino"] = openvino_peer
    return {
        f"{name} {kind}": lambda start=start, kind=kind: start(in_format(source, work, kind), threads)
        for name, start in starts.items()
        for kind in FILE_TYPES
    }


def in_format(source: Path, work: Path, kind: str) -> Path:
    """The same weights in another format, written unless they are there; norms stay in float32."""
    reader = GGUFReader(source)
    if reader.fields["general.file_type"].contents() == FILE_TYPES[kind]:
        return source
    target = work / f"{source.name.split('.')[0]}.{kind}.gguf"
    if target.is_file():
        return target
    work.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    writer = GGUFWriter(part, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        # the writer has its own header, and has said the architecture
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            writer.add_key_value(name, field.contents(), field.types[0], *field.types[1:2])
    writer.add_file_type(FILE_TYPES[kind])
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        stored = GGMLQuantizationType[kind] if values.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return part.rename(target)


def llama_cpp_peer(file: Path, threads: int, *, lookup: int = 0) -> Generate:
    """llama.cpp's server, as its wheel runs it in this process, with a slot for each row of a call.

    The wheel's own calls do not say which tokens they made, its server does. With `lookup` so many tokens a round are
    what followed the last three before.
    """
    import xllamacpp

    @functools.cache
    def server(rows: int) -> Any:
        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.n_ctx, settings.n_parallel = _CONTEXT * rows, rows
        if lookup:
            settings.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
            settings.speculative.ngram_simple.size_n, settings.speculative.ngram_simple.size_m = 3, lookup
        settings.cache_prompt, settings.port, settings.verbosity = False, 0, -1
        return xllamacpp.Server(settings)

    def generate(prompts: Prompts, new_tokens: int) -> Prompts:
        wanted = {"prompt": prompts, "n_predict": new_tokens, "ignore_eos": True, "return_tokens": True}
        # at temperature 0 the only sampler takes the likeliest
        wanted |= {"temperature": 0, "samplers": ["temperature"], "cache_prompt": False}
        request = urllib.request.Request(
            f"{server(len(prompts)).listening_address}/completion",
            json.dumps(wanted).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            rows = json.load(answer)
        return [row["tokens"] for row in (rows if isinstance(rows, list) else [rows])]

    return generate


def openvino_peer(file: Path, threads: int) -> Generate:
    """OpenVINO GenAI's pipeline, which reads the GGUF itself, with its own settings but for the kept prompts."""
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    # else a prompt that was seen before costs nothing, and a longer one goes in pieces of 256
    scheduler.enable_prefix_caching, scheduler.max_num_batched_tokens = False, 4 * _CONTEXT
    pipeline = openvino_genai.LLMPipeline(
        file, "CPU", {"scheduler_config": scheduler, "INFERENCE_NUM_THREADS": threads}
    )
    settings = openvino_genai.GenerationConfig(do_sample=False, ignore_eos=True)

    def generate(prompts: Prompts, new_tokens: int) -> Prompts:
        settings.max_new_tokens = settings.min_new_tokens = new_tokens
        tokens = np.asarray(prompts, np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(tokens), openvino.Tensor(np.ones_like(tokens)))
        return pipeline.generate(inputs, settings).tokens

    return generate
