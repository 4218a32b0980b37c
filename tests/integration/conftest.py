"""What trainings of whole jobs share."""

import pytest

from tests.integration import jobs


@pytest.fixture(scope="session")
def data_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digits, on this machine's disk; nobody changes them."""
    url = (tmp_path_factory.mktemp("digits") / "data").as_uri()
    jobs.make_digits(url)
    return url
