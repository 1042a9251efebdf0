"""`python -m mlx_gptoss` is the command `mlx-gptoss`."""

from mlx_gptoss.cli import main

if __name__ == "__main__":
    main()
