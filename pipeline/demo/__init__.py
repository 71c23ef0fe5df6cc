"""The demo world: small narrated videos whose every fact is known, their subtitles, and a loopback server for them.

Read in this order: `grammar` (what a scene is and what is true about it), `render` (its pixels), `narration` (what is
said, and the subtitle files), `world` (a folder of videos with a truth file), `server` (the folder behind HTTP).
"""
