"""Tools that the server itself runs, for requests that name them."""

__all__: list[str] = []
