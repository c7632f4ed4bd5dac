# What an article executes under `streamlit run`: it is shown, and stops. __file__ is
# the article here.
import sys
from pathlib import Path

import streamlit

if "render" not in sys.modules:
    sys.path.insert(0, str(Path(__file__).parent / "notebooks"))
from render.live import page  # noqa: E402

page(Path(__file__))
streamlit.stop()
