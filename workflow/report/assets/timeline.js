// The timeline: zoom, arrow keys from block to block, and the code behind a block.
const zoom = document.getElementById("zoom");
if (zoom) {
  const now = () => document.querySelector(".at-size:not([hidden]) .lanes");
  const most = () => 4 * Number(now().dataset.end) / Number(now().dataset.last);

  const draw = () => {
    const lanes = now();
    if (!lanes) return;
    const factor = most() ** (Number(zoom.value) / 100);
    const middle = (lanes.scrollLeft + lanes.clientWidth / 2) / lanes.scrollWidth;
    lanes.querySelector(".wide").style.setProperty("--zoom", factor.toFixed(3));
    lanes.scrollLeft = factor === 1 ? 0 : middle * lanes.scrollWidth - lanes.clientWidth / 2;
    document.getElementById("zoom-now").textContent = `${factor.toFixed(factor < 10 ? 1 : 0)} times`;
    drawTicks(lanes, factor);
  };

  function drawTicks(lanes, factor) {
    const end = Number(lanes.dataset.end), raw = end / factor / 6;
    const power = 10 ** Math.floor(Math.log10(raw));
    const gap = [1, 2, 5, 10].map(step => step * power).find(step => step >= raw);
    const axis = lanes.querySelector(".axis");
    axis.replaceChildren();
    for (let n = 0; n * gap <= end; n++) {
      const tick = document.createElement("span");
      tick.style.left = `${100 * n * gap / end}%`;
      tick.textContent = `${Number((n * gap).toPrecision(4))} µs`;
      axis.append(tick);
    }
  }

  zoom.addEventListener("input", draw);
  document.addEventListener("batch", draw);
  document.getElementById("zoom-all").addEventListener("click", () => { zoom.value = 0; draw(); });
  document.getElementById("zoom-last").addEventListener("click", () => {
    const factor = Number(now().dataset.end) / Number(now().dataset.last);
    zoom.value = 100 * Math.log(factor) / Math.log(most());
    draw();
    now().scrollLeft = 0;
  });
  draw();

  // Of each lane one block is reached by Tab, the others by the arrow keys.
  for (const lane of document.querySelectorAll(".lane")) {
    const blocks = [...lane.querySelectorAll("a.block")];
    blocks.forEach((block, i) => {
      block.tabIndex = i ? -1 : 0;
      block.addEventListener("keydown", event => {
        const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
        if (!step || !blocks[i + step]) return;
        event.preventDefault();
        block.tabIndex = -1;
        blocks[i + step].tabIndex = 0;
        blocks[i + step].focus();
      });
    });
  }
}

// The code behind a block is shown below the timeline; the address of a piece of code opens it in the list.
const shownCode = document.getElementById("chosen-code");
for (const block of document.querySelectorAll("a.block")) {
  block.addEventListener("click", event => {
    event.preventDefault();
    const piece = document.querySelector(block.hash).cloneNode(true);
    piece.removeAttribute("id");
    piece.open = true;
    shownCode.replaceChildren(piece);
    for (const other of document.querySelectorAll(".block.chosen")) other.classList.remove("chosen");
    block.classList.add("chosen");
  });
}
function openCode() {
  const piece = document.getElementById(location.hash.slice(1));
  if (!piece?.matches("details.code")) return;
  piece.open = piece.parentElement.open = true;
  piece.scrollIntoView();
}
addEventListener("hashchange", openCode);
openCode();
