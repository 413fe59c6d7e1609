"""docs/settings.md is what the code says of its settings."""

from pokebridge.settings import Settings, groups
from tools import settings_docs


def test_the_page_is_the_codes() -> None:
    """docs/settings.md is what `make docs` makes of the sources."""
    assert settings_docs.PAGE.read_text() == settings_docs.render(), "run `make docs`"


def test_every_setting_is_in_one_group() -> None:
    """No setting is left out, and none stands twice."""
    names = [name for group in groups().values() for name in group]
    assert names == list(Settings.model_fields)
