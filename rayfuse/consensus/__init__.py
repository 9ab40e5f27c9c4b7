"""Who is right: the reliability of labels, teachers and pivot, learnt from their answers without supervision.

    prompts -> candidates (labels, every model's own answer) -> groups of equal answers -> EM over who is right
            -> responses to learn from, weights of teachers, pairs for preference stages, labels that are probably wrong

The maths is plain numpy; `asking` is the part that needs Ray.
"""
