"""Folders whose modules engines build under other paths than the checkpoint's tensors have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import skeleton
from family_builds import build_checked, write_family
from tiny import read_json, write_json
from verifying import Copy
from zoo import FAMILIES

from carnice_build.formats.checks import TorchChecks
