"""What figures are drawn with: layout, style, panels, wording, and the program that draws one."""
