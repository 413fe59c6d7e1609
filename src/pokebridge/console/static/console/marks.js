// By what an instance is told from the others: a letter, a colour and a pattern, the same
// everywhere on the page and for as long as it is open.

const HUES = 8;
const PATTERNS = 4;

const numbers = new Map();

function numberOf(instance) {
  if (!numbers.has(instance)) numbers.set(instance, numbers.size);
  return numbers.get(instance);
}

/** A, B, …, Z, AA, AB, … */
export function letterOf(instance) {
  let number = numberOf(instance);
  let letters = "";
  do {
    letters = String.fromCharCode(65 + (number % 26)) + letters;
    number = Math.floor(number / 26) - 1;
  } while (number >= 0);
  return letters;
}

export function classesOf(instance) {
  const number = numberOf(instance);
  return `hue-${number % HUES} pattern-${(number + Math.floor(number / HUES)) % PATTERNS}`;
}

/** A small square that stands for the instance. */
export function markOf(instance) {
  const mark = document.createElement("span");
  mark.className = `mark ${classesOf(instance)}`;
  mark.textContent = letterOf(instance);
  mark.setAttribute("aria-hidden", "true");
  return mark;
}
