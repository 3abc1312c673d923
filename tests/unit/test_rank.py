"""What a rank of a training job tells the terminal and its own file."""

from __future__ import annotations

import logging

from cluster.process import Process
from dermfm.rank import write_logs


def test_the_terminal_is_spared_what_nobody_s_logger_says_short_of_a_warning(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(logging.root, "handlers", [])  # as in a new process
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    path = tmp_path / "log" / "rank0.log"
    write_logs(path, Process(rank=0, world=1, local_rank=0, device="cpu"))
    logging.getLogger("dermfm.train").info("step 1")
    logging.getLogger().info("gcc -c test.c")
    logging.getLogger().warning("the disk is nearly full")
    for handler in logging.root.handlers:
        handler.close()
    assert capsys.readouterr().out.splitlines() == ["step 1", "the disk is nearly full"]
    told = [line.split(" ", 3)[3] for line in path.read_text().splitlines()]
    assert told == ["step 1", "gcc -c test.c", "the disk is nearly full"]
