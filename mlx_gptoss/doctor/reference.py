"""Print the answers of MLX's CPU backend as JSON: a process of its own, beside the one that uses the GPU."""

from __future__ import annotations

import mlx.core as mx

from mlx_gptoss.doctor import answers


def main() -> None:
    """Compute and print."""
    mx.set_default_device(mx.cpu)  # before anything asks what it is
    print(answers.compute([answer.prompt for answer in answers.stored().replies]).as_json())


if __name__ == "__main__":
    main()
