// Keys that are pressed.

// Whether a key is for an input method, which composes characters: Enter chooses one of them, and
// Escape leaves them. Safari tells it by the code alone, after the composition's end.
export const composing = (event) => event.isComposing || event.keyCode === 229;
