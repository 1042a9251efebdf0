"""Write mlx_gptoss/doctor/answers.json: run it on the CPU backend when the demo model has changed.

python scripts/make_doctor_answers.py
"""

from __future__ import annotations

from pathlib import Path

from mlx_gptoss import device
from mlx_gptoss.checkpoint.hub import DEMO_FOLDER
from mlx_gptoss.doctor.answers import PROMPTS, compute
from mlx_gptoss.harmony import Conversation, Message, render
from mlx_gptoss.tokenizer import Tokenizer

TARGET = Path(__file__).resolve().parent.parent / "mlx_gptoss" / "doctor" / "answers.json"
DATE = "2025-08-05"  # the system message tells one


def main() -> None:
    """Compute and write."""
    if device.on_gpu():
        raise SystemExit("the stored answers are the CPU backend's: run this where MLX has no GPU")
    tokenizer = Tokenizer.from_folder(DEMO_FOLDER)
    conversations = [Conversation([Message.user(text)], current_date=DATE) for text in PROMPTS]
    answers = compute([render(conversation, tokenizer) for conversation in conversations])
    TARGET.write_text(answers.as_json() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
