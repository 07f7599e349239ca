"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const card = document.getElementById("card");

// Everything shown is set as text, so no token can become markup.
function make(tag, properties = {}, children = []) {
  const { p, ...plain } = properties;
  const node = Object.assign(document.createElement(tag), plain);
  if (p !== undefined) node.style.setProperty("--p", p);
  node.append(...children);
  return node;
}
const percent = (p) => (p === null ? "?" : p < 0.00005 ? "< 0.01 %" : `${(100 * p).toFixed(p < 0.01 ? 2 : 1)} %`);
const nats = (x) => (x === null ? "not finite" : `${x && Math.abs(x) < 0.001 ? x.toExponential(1) : x.toFixed(3)} nats`);

function side(name, values) {
  const list = make("dl", {}, values.top.flatMap(([text, p, written]) => [
    make("dt", { textContent: text, className: written ? "written" : "", p }),
    make("dd", { textContent: percent(p), className: written ? "written" : "" }),
  ]));
  const rest = `this token ${percent(values.p)}; entropy ${nats(values.h)}`;
  return make("div", { className: name }, [make("h6", { textContent: name }), list, make("p", { textContent: rest })]);
}

function show(token) {
  const tokens = [...token.parentElement.children];
  const found = data.answers[token.parentElement.dataset.answer][tokens.indexOf(token)];
  const head = make("h5", {}, [make("code", { textContent: token.textContent.trim() || "␣" })]);
  if (found.teacher) head.append("  divergence ", make("b", { textContent: nats(found.d) }));
  const sides = [side("student", found.student)].concat(found.teacher ? [side("teacher", found.teacher)] : []);
  card.replaceChildren(head, make("div", { className: "sides" }, sides));
  card.hidden = false;
  const at = token.getClientRects()[0] || token.getBoundingClientRect();
  const left = Math.max(4, Math.min(at.left, document.documentElement.clientWidth - card.offsetWidth - 8));
  const below = at.bottom + 6 + card.offsetHeight < window.innerHeight || at.top < card.offsetHeight + 6;
  card.style.left = `${left + window.scrollX}px`;
  card.style.top = `${(below ? at.bottom + 6 : at.top - card.offsetHeight - 6) + window.scrollY}px`;
  token.setAttribute("aria-describedby", "card");
}

function hide() {
  card.hidden = true;
  document.querySelector("[aria-describedby=card]")?.removeAttribute("aria-describedby");
}

for (const answer of document.querySelectorAll(".answer")) {
  const token = (event) => event.target.closest(".answer > span");
  answer.addEventListener("mouseover", (event) => { hide(); if (token(event)) show(token(event)); });
  answer.addEventListener("mouseleave", hide);
  answer.addEventListener("focusin", (event) => { hide(); if (token(event)) show(token(event)); });
  answer.addEventListener("focusout", hide);
  answer.addEventListener("click", (event) => { if (token(event)) go(token(event)); });
  answer.addEventListener("keydown", (event) => {
    const here = token(event);
    const ends = { Home: answer.firstElementChild, End: answer.lastElementChild };
    const next = { ArrowRight: here?.nextElementSibling, ArrowLeft: here?.previousElementSibling, ...ends }[event.key];
    if (event.key === "Escape") hide();
    if (next) { event.preventDefault(); go(next); }
  });
}

function go(token) {  // one Tab stop per answer: the token that was visited last
  for (const other of token.parentElement.querySelectorAll("[tabindex]")) other.removeAttribute("tabindex");
  token.tabIndex = 0;
  token.focus();
}

for (const figure of document.querySelectorAll(".chart")) {
  const { series } = data.charts[figure.dataset.chart];
  const svg = figure.querySelector("svg"), cursor = figure.querySelector(".cursor");
  const reading = [...figure.querySelectorAll(".reading > *")];
  const longest = series.reduce((a, b) => (b.x.length > a.x.length ? b : a));
  let place = longest.x.length - 1;
  const nearest = (xs, x) => xs.reduce((best, at, i) => (Math.abs(at - x) < Math.abs(xs[best] - x) ? i : best), 0);
  const read = (x) => {
    place = nearest(longest.x, x);
    cursor.setAttribute("x1", longest.x[place]);
    cursor.setAttribute("x2", longest.x[place]);
    cursor.style.visibility = "visible";
    series.forEach((one, i) => {
      const at = nearest(one.x, longest.x[place]);
      const missing = one.step[at] !== longest.step[place];
      reading[i].querySelector("b").textContent = missing ? "–" : String(one.value[at]);
    });
    reading[series.length].textContent = `at step ${longest.step[place]}`;
  };
  svg.addEventListener("mousemove", (event) => {
    const box = svg.getBoundingClientRect();
    read(((event.clientX - box.left) * svg.viewBox.baseVal.width) / box.width);
  });
  svg.addEventListener("mouseleave", () => { cursor.style.visibility = "hidden"; });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    read(longest.x[Math.max(0, Math.min(longest.x.length - 1, place + step))]);
  });
}

for (const sound of document.querySelectorAll(".sound")) {
  const audio = sound.querySelector("audio"), head = sound.querySelector(".head"), wave = sound.querySelector(".wave");
  audio.addEventListener("timeupdate", () => {
    const x = (wave.viewBox.baseVal.width * audio.currentTime) / (audio.duration || 1);
    head.setAttribute("x1", x);
    head.setAttribute("x2", x);
    head.style.visibility = audio.currentTime > 0 && !audio.ended ? "visible" : "hidden";
  });
}
