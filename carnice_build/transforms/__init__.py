"""Steps and formats that recipes may name, and the ops behind them.

To add one, write its file and list it in `vocabulary.py`.
"""
