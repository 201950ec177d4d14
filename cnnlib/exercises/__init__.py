"""The exercises of the course: stages with holes, cut from the shipped sources, and their grading.

What an exercise is says cnnlib/exercises/catalogue.py; its texts are in cnnlib/exercises/texts/.
"""
