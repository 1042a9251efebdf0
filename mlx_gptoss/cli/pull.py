"""`mlx-gptoss pull`: download a model, without loading it."""

from __future__ import annotations

import click

from mlx_gptoss.cli.options import hub_argument, revision_option


@click.command()
@hub_argument
@revision_option
def pull(model: str, revision: str | None) -> None:
    """Download MODEL, a short name or a Hub id, into the Hub's cache.

    Only what loading reads is downloaded. Ctrl-C stops it; the same command goes on after the last file that
    was finished.
    """
    from functools import partial

    from mlx_gptoss.checkpoint.hub import is_repo_id, resolve
    from mlx_gptoss.checkpoint.names import did_you_mean, expand, short_name
    from mlx_gptoss.errors import ModelNotFoundError

    repo = expand(model)
    if not is_repo_id(repo):
        raise ModelNotFoundError(
            f"{model!r} is not on the Hub: expected 20b, 120b, safeguard-20b, safeguard-120b or an id like "
            f"'openai/gpt-oss-20b'{did_you_mean(model)}"
        )
    folder = resolve(model, revision=revision, announce=partial(click.echo, err=True))
    pinned = f" --revision {revision}" if revision else ""
    click.echo(f"{repo} is in {folder}")
    click.echo(f"next: mlx-gptoss chat {short_name(repo)}{pinned}")
