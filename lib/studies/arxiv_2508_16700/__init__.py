"""What the study of arXiv 2508.16700 adds: rules that its file in params/published/ cannot say."""
