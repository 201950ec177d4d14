// The batch slider, words explained on hover, and figures in full size.
document.documentElement.classList.remove("plain");
for (const part of document.querySelectorAll(".needs-script[hidden]")) part.hidden = false;

for (const part of document.querySelectorAll("details.folds")) part.open = false;

// Every slider of the batch moves all others, and shows the parts of its batch.
const batches = [...document.querySelectorAll("input.batch")];
function showBatch(place) {
  const size = batches[0].dataset.sizes.split(" ")[place];
  for (const each of batches) {
    each.value = place;
    each.setAttribute("aria-valuetext", `${size} images`);
  }
  for (const now of document.querySelectorAll(".batch-now")) now.textContent = size;
  for (const part of document.querySelectorAll(".at-size")) part.hidden = part.dataset.size !== size;
  document.dispatchEvent(new CustomEvent("batch"));
}
for (const each of batches) each.addEventListener("input", () => showBatch(Number(each.value)));
if (batches.length) showBatch(Number(batches[0].value));

// A word's meaning, shown beside it while the pointer or the focus is there; Escape hides it.
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
tip.setAttribute("role", "tooltip");
document.body.append(tip);

function explain(word) {
  tip.textContent = word.dataset.tip;
  tip.hidden = false;
  const place = word.getBoundingClientRect(), wide = tip.getBoundingClientRect().width;
  const left = Math.max(8, Math.min(place.left, document.documentElement.clientWidth - wide - 8));
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${place.bottom + scrollY + 6}px`;
}

for (const word of document.querySelectorAll(".term, .block, .stack span, .step")) {
  word.dataset.tip = word.title;
  if (word.classList.contains("block")) word.setAttribute("aria-label", word.title);
  word.removeAttribute("title");
  for (const begin of ["pointerenter", "focus"]) word.addEventListener(begin, () => explain(word));
  for (const end of ["pointerleave", "blur"]) word.addEventListener(end, () => { tip.hidden = true; });
}
addEventListener("keydown", event => {
  if (event.key !== "Escape") return;
  tip.hidden = true;
  document.querySelector("figure.full")?.classList.remove("full");
});

for (const place of document.querySelectorAll("figure.drawn .scroll")) {
  place.tabIndex = 0;
  place.setAttribute("role", "button");
  place.setAttribute("aria-label", "Show the figure in full size, or small again");
  const turn = () => place.parentElement.classList.toggle("full");
  place.addEventListener("click", turn);
  place.addEventListener("keydown", event => { if (event.key === "Enter") turn(); });
}
