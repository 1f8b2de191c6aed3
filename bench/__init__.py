"""What the ops and the models cost, next to what people use today: checked, then timed, then
written down.
"""
