"""Where messages go: terminal and file, by rank."""

import logging

import pytest

from mmdet3d.utils.logging import NAME, setup_logger


@pytest.fixture(autouse=True)
def restored():
    logger = logging.getLogger(NAME)
    before = logger.level, logger.propagate, list(logger.handlers)
    yield
    for handler in set(logger.handlers) - set(before[2]):
        logger.removeHandler(handler)
        handler.close()
    logger.level, logger.propagate = before[:2]


def test_rank_0_writes_to_terminal_and_file(tmp_path, capsys):
    setup_logger()
    setup_logger(tmp_path / "new" / "a.log", "INFO")
    logging.getLogger("mmdet3d.some.module").info("once")
    logging.getLogger("mmdet3d.some.module").debug("never")
    text = (tmp_path / "new/a.log").read_text()
    assert text.endswith("mmdet3d.some.module - INFO - once\n") and text.count("\n") == 1
    assert capsys.readouterr().err.count("once") == 1


def test_other_ranks_write_errors_with_their_number(tmp_path, capsys):
    setup_logger(tmp_path / "a.log", rank=3)
    logging.getLogger("mmdet3d.some.module").warning("hidden")
    logging.getLogger("mmdet3d.some.module").error("shown")
    err = capsys.readouterr().err
    assert err.startswith("[rank 3] ") and "shown" in err and "hidden" not in err
    assert not (tmp_path / "a.log").exists()


def test_unknown_level():
    with pytest.raises(ValueError, match="LOUD"):
        setup_logger(level="LOUD")
