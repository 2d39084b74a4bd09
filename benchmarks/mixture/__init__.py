"""What building a mixture of experts takes, beside a plain merge of the same models."""
