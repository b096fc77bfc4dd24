"""How many examples hypothesis draws in a test: `quick` (the default) and `full` (`make test-full`).

The same examples each time (derandomized), so that a failure comes back."""

from hypothesis import settings

settings.register_profile("quick", max_examples=15, deadline=None, derandomize=True, database=None)
settings.register_profile("full", settings.get_profile("quick"), max_examples=200)
settings.load_profile("quick")  # pytest --hypothesis-profile full loads the other one


def examples(times: float) -> settings:
    """For a test whose examples cost less or more than others' do: so many times the profile's number of them."""
    return settings(max_examples=max(1, round(times * settings.default.max_examples)))
