"""The bundled pair in fp32 (or another pair) as WORK/target and WORK/draft, and each peer's environment and conversion.

    python benchmarks/peers/prepare.py WORK [--target folder --draft folder] [--only openvino,llamacpp,…]

Runs in specbeam's environment. A peer that cannot be installed or converted is named, and the others go on; each
peer's log is WORK/<peer>.log.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXPORT = ("{bin}/optimum-cli export openvino -m {work}/ROLE --task text-generation-with-past --weight-format fp32 "
          "{work}/openvino/ROLE")  # fmt: skip
# peer → (requirements file, commands in that environment; {bin} and {work} are filled in)
PEERS: dict[str, list[tuple[str, list[str]]]] = {
    "openvino": [
        ("openvino-convert", [
            "{bin}/python -m pip uninstall --yes torchvision",  # without a matching torch transformers fails over it
            EXPORT.replace("ROLE", "target"), EXPORT.replace("ROLE", "draft"),
        ]),
        ("openvino", []),
    ],
    "onnxruntime": [("onnxruntime", [
        "{bin}/python -m onnxruntime_genai.models.builder -i {work}/target -o {work}/onnxruntime/target -p fp32 -e cpu "
        "-c {work}/cache"])],
    "ctranslate2": [("ctranslate2", [
        "{bin}/ct2-transformers-converter --model {work}/target --output_dir {work}/ctranslate2/target --force"])],
    "llamacpp": [("llamacpp", [f"{{bin}}/python {HERE}/to_gguf.py {{work}}"])],
}  # fmt: skip


def save_pair(work: Path, target: str, draft: str) -> None:
    import torch

    import specbeam

    for path, role in ((target, "target"), (draft, "draft")):
        model, tokenizer = specbeam.load_model(path, dtype=torch.float32, device="cpu")
        model.save_pretrained(work / role, max_shard_size="100GB")
        tokenizer.save_pretrained(work / role)


def run(command: list[str], log: Path) -> None:
    with open(log, "ab") as file:
        subprocess.run(command, check=True, stdout=file, stderr=file)


def set_up(peer: str, work: Path) -> None:
    log = work / f"{peer}.log"
    for requirements, commands in PEERS[peer]:
        place = work / "venv" / requirements
        if not (place / ".ready").exists():
            run([sys.executable, "-m", "venv", str(place)], log)
            run([f"{place}/bin/python", "-m", "pip", "install", "-r", f"{HERE}/requirements-{requirements}.txt"], log)
        for command in commands:
            run([part.format(bin=f"{place}/bin", work=work) for part in command.split()], log)
        (place / ".ready").touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--target", default="bundled")
    parser.add_argument("--draft", default="bundled-draft")
    parser.add_argument("--only", default=",".join(PEERS))
    chosen = parser.parse_args()
    work = chosen.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    save_pair(work, chosen.target, chosen.draft)
    for peer in chosen.only.split(","):
        try:
            set_up(peer, work)
            print(f"{peer}: ready")
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"{peer}: not available here ({error}); see {work / f'{peer}.log'}")


main()
