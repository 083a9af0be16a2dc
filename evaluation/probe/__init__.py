"""Probing: prompts, answers, measures, statistics, saved outputs, translations, chat."""
