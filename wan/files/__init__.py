"""Files of tensors: which model they are, their headers and formats, and values read row by row."""
