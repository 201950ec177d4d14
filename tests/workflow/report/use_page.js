// What a reader does with the report, in frames as wide as a desktop and a phone, and in one without scripts.
// The answers go into the text of the outer page.

const frames = Object.fromEntries([...document.querySelectorAll("iframe")].map(frame => [frame.id, frame]));

function widthOf(frame) {
  const root = frame.contentDocument.documentElement;
  return {scroll: root.scrollWidth, client: frame.clientWidth};
}

function brightness(color) {
  const [r, g, b] = color.match(/[\d.]+/g).map(Number).map(value => value / 255)
    .map(value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

// Texts that are visible and whose contrast with what is behind them is below 4.5 (WCAG 2, level AA).
function pale(frame) {
  const window = frame.contentWindow, found = [];
  for (const element of frame.contentDocument.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility({visibilityProperty: true}) || element.closest("svg, script, style")) continue;
    let behind = element;
    while (behind && /^rgba\(.*, 0\)$|transparent/.test(window.getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
    const paper = behind ? window.getComputedStyle(behind).backgroundColor : "rgb(255, 255, 255)";
    const [a, b] = [brightness(window.getComputedStyle(element).color), brightness(paper)];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) found.push(`${element.className || element.tagName} "${element.textContent.trim().slice(0, 30)}" ${contrast.toFixed(1)}`);
  }
  return [...new Set(found)].slice(0, 8);
}

function ladderOf(frame) {
  const open = frame.contentDocument.querySelector(".at-size:not([hidden]) .rungs");
  return Object.fromEntries([...open.tBodies[0].rows].map(row => [
    row.cells[0].childNodes[1].textContent.trim(), [...row.cells].slice(1, 6).map(cell => (cell.querySelector("strong") ?? cell).textContent.trim()),
  ]));
}

function batch(frame, size) {
  const slider = frame.contentDocument.querySelectorAll("input.batch")[size === 64 ? 0 : 1];
  slider.value = slider.dataset.sizes.split(" ").indexOf(String(size));
  slider.dispatchEvent(new frame.contentWindow.Event("input"));
}

function draw(frame, points) {
  const document = frame.contentDocument, paper = document.getElementById("paper");
  document.getElementById("wipe").click();
  paper.scrollIntoView();
  const box = paper.getBoundingClientRect();
  points.forEach(([x, y], i) => {
    const where = {clientX: box.left + x * box.width, clientY: box.top + y * box.height, bubbles: true};
    paper.dispatchEvent(new frame.contentWindow.PointerEvent(i ? "pointermove" : "pointerdown", where));
  });
  frame.contentWindow.dispatchEvent(new frame.contentWindow.PointerEvent("pointerup"));
  return Number(document.getElementById("answer").dataset.digit);
}

function use(frame) {
  const document = frame.contentDocument, seen = {};
  seen.opened = ladderOf(frame);
  batch(frame, 1024);
  seen.moved = ladderOf(frame);
  seen.now = [...document.querySelectorAll(".batch-now")].map(now => now.textContent);
  seen.lanes = document.querySelectorAll(".at-size:not([hidden]) .lane").length;
  batch(frame, 64);

  const ring = Array.from({length: 25}, (_, i) => [0.5 + 0.22 * Math.sin(i / 24 * 2 * Math.PI), 0.5 - 0.33 * Math.cos(i / 24 * 2 * Math.PI)]);
  seen.drawn = [draw(frame, ring), draw(frame, [[0.5, 0.15], [0.5, 0.5], [0.5, 0.85]])];
  seen.layers = document.querySelectorAll("#layers .layer").length;
  seen.logits = frame.contentWindow.eval(
    "page.recognition.digits.map(digit => [...makeNetwork(page.network)(bytesOf(digit.pixels)).at(-1).values])");
  const sample = document.getElementById("sample");
  seen.samples = [...sample.options].slice(1).map(option => {
    sample.value = option.value;
    sample.dispatchEvent(new frame.contentWindow.Event("change"));
    return Number(document.getElementById("answer").dataset.digit);
  });

  const zoom = document.getElementById("zoom"), lanes = document.querySelector(".at-size:not([hidden]) .lanes");
  const before = lanes.scrollWidth;
  zoom.value = 100;
  zoom.dispatchEvent(new frame.contentWindow.Event("input"));
  seen.zoomed = lanes.scrollWidth / before;
  const block = [...lanes.querySelectorAll("a.block")].at(-1);
  block.click();
  seen.code = document.getElementById("chosen-code").innerText;

  const [first, second] = lanes.querySelectorAll(".lane a.block");
  first.focus();
  first.dispatchEvent(new frame.contentWindow.KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
  seen.arrow = document.activeElement === second && second.tabIndex === 0 && first.tabIndex === -1;
  seen.reached = [...lanes.querySelectorAll(".lane")].map(lane => lane.querySelectorAll('a.block[tabindex="0"]').length);

  const moment = document.getElementById("race-at");
  const right = () => document.querySelectorAll("#race-rows canvas.right").length;
  seen.race = [right()];
  moment.value = 1000;
  moment.dispatchEvent(new frame.contentWindow.Event("input"));
  seen.race.push(right());
  seen.clock = document.getElementById("race-clock").textContent;

  const word = document.querySelector(".term");
  word.dispatchEvent(new frame.contentWindow.Event("focus"));
  seen.tip = document.getElementById("tip").textContent;
  seen.full = (document.querySelector("figure.drawn .scroll")?.click(), Boolean(document.querySelector("figure.full")));
  document.querySelector("figure.full .scroll")?.click();
  return seen;
}

addEventListener("load", () => setTimeout(() => {
  const answer = {};
  try {
    answer.use = use(frames.wide);
    for (const [name, frame] of Object.entries(frames)) answer[name] = {...widthOf(frame), pale: pale(frame)};
    for (const name of ["wide", "narrow"]) {
      const window = frames[name].contentWindow;
      answer[name].problems = window.problems;
      answer[name].outside = window.performance.getEntriesByType("resource").map(entry => entry.name).filter(url => !url.startsWith("data:"));
    }
    const images = [...frames.wide.contentDocument.images];
    answer.images = {there: images.length, shown: images.filter(image => image.complete && image.naturalWidth).length};
    const plain = frames.plain.contentDocument;
    answer.plain.text = plain.body.innerText;
    answer.plain.controls = [...plain.querySelectorAll(".needs-script")].filter(part => part.checkVisibility()).length;
    answer.cards = frames.narrow.contentWindow.getComputedStyle(frames.narrow.contentDocument.querySelector(".rungs tr")).display;
  } catch (error) { answer.error = String(error.stack ?? error); }
  document.querySelector("pre").textContent = JSON.stringify(answer);
}, 300));
