"""What the transports' tests share."""

import pytest
from tests.transport.certificates import Certificates, make_certificates


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """An authority's certificate and one of its own making for 127.0.0.1."""
    return make_certificates(tmp_path_factory.mktemp("certificates"))
