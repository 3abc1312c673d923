"""What every rank imports: about eight seconds of work that the server in `conftest.warm` does once for all ranks.

Nothing here may start a thread or run an operation: a forked process would have neither.
"""

from __future__ import annotations

import gc

import timm
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer, BertModel

import dermfm.rank
import dermfm.train
import launch.cli
from dermfm import zero

zero.ready("cpu")
gc.freeze()  # pages that the collector does not touch stay shared; and who counts objects does not see these

__all__ = ["AutoModel", "AutoTokenizer", "BertModel", "Tokenizer", "dermfm", "launch", "timm"]
