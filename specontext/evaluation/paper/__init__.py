"""The paper's tables of tokens a second, end to end: Hugging Face, our full attention, other methods, and ours."""
